# The first job of a study. It has no params and runs only once: a later change is checked by the phases that it reruns.
rule preflight:
    output:
        update(STUDY.preflight()),
    log:
        STUDY.log("preflight"),
    benchmark:
        STUDY.benchmark("preflight")
    conda:
        "../envs/genseg.yaml"
    threads: STUDY.threads("backbone")
    resources:
        **STUDY.resources("backbone"),
    params:
        file=STUDY.params("preflight")["file"],
    shell:
        STUDY.command("preflight")
