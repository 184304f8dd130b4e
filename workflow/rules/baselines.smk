rule baselines:
    input:
        f"{DATA}/manifest.json",
        f"{RESULTS}/backbone/manifest.json",
        STUDY.imported(),
    output:
        f"{RESULTS}/baselines/manifest.json",
    log:
        STUDY.log("baselines"),
    benchmark:
        STUDY.benchmark("baselines")
    conda:
        "../envs/genseg.yaml"
    threads: STUDY.threads("baselines")
    resources:
        **STUDY.resources("baselines"),
    params:
        **STUDY.params("baselines"),
    shell:
        STUDY.command("baseline")
