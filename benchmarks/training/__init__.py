"""Training and fine-tuning of the detectors that are measured, and of the bundled one."""
