rule backbone:
    input:
        f"{DATA}/manifest.json",
        STUDY.local_backbone(),
    output:
        f"{RESULTS}/backbone/manifest.json",
    log:
        STUDY.log("backbone"),
    benchmark:
        STUDY.benchmark("backbone")
    conda:
        "../envs/genseg.yaml"
    threads: STUDY.threads("backbone")
    resources:
        **STUDY.resources("backbone"),
    params:
        **STUDY.params("backbone"),
    shell:
        STUDY.command("backbone")
