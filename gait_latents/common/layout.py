"""Names of the files in the folders that the scripts write: a cache, a run, generated images, an evaluation.

A folder of ours is known by these files, and so is never taken for a class of images.
"""

# Files by which a folder that a script wrote is known: a training run, generated images, an evaluation.
SETTINGS_NAME = "settings.yaml"
RECORD_NAME, LABELS_NAME = "settings.json", "labels.csv"
REPORT_NAME, PAGE_NAME = "report.json", "report.html"
MANIFEST_NAME = "manifest.json"
METRICS_NAME = "metrics.jsonl"
SPLIT_NAME = "split.json"
