"""The DAG of a study: Snakemake rules, DVC stages, GPU leases and the DAG of a sweep."""
