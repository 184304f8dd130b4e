rule score:
    input:
        f"{DATA}/manifest.json",
        STUDY.predictions(),
        STUDY.refinement(),
    output:
        f"{RESULTS}/scores/manifest.json",
    log:
        STUDY.log("score"),
    benchmark:
        STUDY.benchmark("score")
    conda:
        "../envs/genseg.yaml"
    threads: STUDY.threads("score")
    resources:
        **STUDY.resources("score"),
    params:
        **STUDY.params("score"),
    shell:
        STUDY.command("score")
