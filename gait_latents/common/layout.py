"""Names of the files in the folders that the scripts write: a cache, a run, generated images, an evaluation.

They are in one place because scripts look for each other's files: a folder that holds one of them was written by a
script, and is never taken for a class of images.
"""

SETTINGS_NAME, METRICS_NAME = "settings.yaml", "metrics.jsonl"  # of a training run
RECORD_NAME, LABELS_NAME = "settings.json", "labels.csv"  # of a folder of generated images
REPORT_NAME, PAGE_NAME = "report.json", "report.html"  # of an evaluation
MANIFEST_NAME = "manifest.json"  # of a cache
SPLIT_NAME = "split.json"  # of a cache and of a training run: which images are for training, which for testing
