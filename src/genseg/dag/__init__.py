"""The DAG of a study: Snakemake rules, DVC stages, GPU leases and sweeps."""
