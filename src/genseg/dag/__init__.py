"""The study's DAG: what each phase uses and makes, and how Snakemake, DVC and the GPUs of a machine agree about it."""
