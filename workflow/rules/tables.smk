rule tables:
    input:
        STUDY.published(),
        STUDY.seeds(),
        f"{DATA}/manifest.json",
        STUDY.models()[:1],
        STUDY.predictions(),
        f"{RESULTS}/refined/manifest.json",
        f"{RESULTS}/scores/manifest.json",
    # `update` keeps Snakemake from deleting these files before the job, which reuses them if they are up to date.
    output:
        f"{RESULTS}/tables/manifest.json",
        report(update(f"{RESULTS}/tables/index.html"), caption="../report/tables.rst", category="Tables"),
        [
            report(update(f"{RESULTS}/{file}"), caption=caption, category=category)
            for file, caption, category in STUDY.results_of_gs()
        ],
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
