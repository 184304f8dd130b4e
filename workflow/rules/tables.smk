rule tables:
    input:
        STUDY.published(),
        f"{DATA}/manifest.json",
        f"{RESULTS}/model/gs/manifest.json",
        f"{RESULTS}/predictions/manifest.json",
        f"{RESULTS}/refined/manifest.json",
        f"{RESULTS}/scores/manifest.json",
    # `update` keeps Snakemake from deleting these files before the job, which reuses them if they are up to date.
    output:
        f"{RESULTS}/tables/manifest.json",
        report(update(f"{RESULTS}/tables/index.html"), caption="../report/tables.rst", category="Tables"),
        report(update(f"{RESULTS}/tables/table2.csv"), caption="../report/table2.rst", category="Tables"),
        report(update(f"{RESULTS}/figures/examples.png"), caption="../report/examples.rst", category="Figures"),
        report(update(f"{RESULTS}/figures/evolution.png"), caption="../report/evolution.rst", category="Figures"),
        report(update(f"{RESULTS}/figures/failures.png"), caption="../report/failures.rst", category="Figures"),
        report(update(f"{RESULTS}/figures/narratives.png"), caption="../report/narratives.rst", category="Figures"),
        report(update(f"{RESULTS}/figures/readouts.png"), caption="../report/readouts.rst", category="Figures"),
    log:
        STUDY.log("tables"),
    benchmark:
        STUDY.benchmark("tables")
    conda:
        "../envs/genseg.yaml"
    threads: STUDY.threads("tables")
    resources:
        **STUDY.resources("tables"),
    params:
        **STUDY.params("tables"),
    shell:
        STUDY.command("tables")
