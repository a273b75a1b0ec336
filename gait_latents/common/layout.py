"""Names of the files in the folders that the scripts write: a cache, a run, generated images, an evaluation, an export.

A folder of ours is known by some of these files (`images/folders.py`), and so is never taken for a class of images.
Files whose names hold a number or a digest are named where they are written: checkpoints and grids in
`training/run_folder.py`, shards in `latents/shard.py`.
"""

SPLIT_NAME = "split.json"  # of a cache and of a run: which images are for training, validation and testing

# A cache, made by preprocess_latents.py or by training.
MANIFEST_NAME = "manifest.json"
PREVIEW_NAME = "preview.png"  # a few images, and below them what the VAE decodes from their latents
CHANNELS_NAME = "latents.png"  # the distribution of the latents in each channel, drawn by --verify

# A run of train_latent_cfg.py.
SETTINGS_NAME = "settings.yaml"
METRICS_NAME = "metrics.jsonl"
LOSS_NAME = "loss.png"

# Images made by generate.py.
RECORD_NAME, LABELS_NAME = "settings.json", "labels.csv"
OVERVIEW_NAME = "overview.png"  # the first images of the first classes
STRIP_NAME = "strip.png"  # one image of each class and guidance scale, drawn by --strip
GENERATED_NAMES = frozenset({RECORD_NAME, LABELS_NAME, OVERVIEW_NAME, STRIP_NAME})  # what no class may be called

# An evaluation by evaluate_images.py.
REPORT_NAME, PAGE_NAME = "report.json", "report.html"
PAIRS_NAME = "closest_pairs.png"  # generated images beside the training images that are nearest to them

# A model exported by python -m gait_latents.export.
WEIGHTS_NAME, CONFIG_NAME = "model.safetensors", "config.json"
DATASET_NAME = "dataset.json"  # beside exported latents
