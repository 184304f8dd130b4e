"""The paper's study in small: local servers play the sources of `data/sources.csv` and the hub, and Snakemake runs the study.

`python -m rehearsal FOLDER` (with `tests` on PYTHONPATH) runs all of it; `make rehearsal` calls it. Nothing in the product is
replaced: `data/sources.csv` lists the local host, and `HF_ENDPOINT` names the local hub.
"""
