rule data:
    output:
        f"{DATA}/manifest.json",
    log:
        f"{WORK}/logs/data.log",
    benchmark:
        f"{WORK}/benchmarks/data.tsv"
    conda:
        "../envs/genseg.yaml"
    threads: STUDY.threads("data")
    resources:
        **STUDY.resources("data"),
    params:
        uses=STUDY.uses("data"),
        code=STUDY.code("data"),
        file=STUDY.params_file,
    shell:
        "exec genseg lease --log {log} --gpus {resources.gpu} -- genseg data --params {params.file}"
