rule data:
    input:
        ancient(STUDY.preflight()),
    output:
        f"{DATA}/manifest.json",
    log:
        STUDY.log("data"),
    benchmark:
        STUDY.benchmark("data")
    conda:
        "../envs/genseg.yaml"
    threads: STUDY.threads("data")
    resources:
        **STUDY.resources("data"),
    params:
        **STUDY.params("data"),
    shell:
        STUDY.command("data")
