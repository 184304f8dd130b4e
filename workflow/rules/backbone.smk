rule backbone:
    input:
        f"{DATA}/manifest.json",
        STUDY.local_backbone(),
    output:
        f"{RESULTS}/backbone/manifest.json",
    log:
        f"{WORK}/logs/backbone.log",
    benchmark:
        f"{WORK}/benchmarks/backbone.tsv"
    conda:
        "../envs/genseg.yaml"
    threads: STUDY.threads("backbone")
    resources:
        **STUDY.resources("backbone"),
    params:
        uses=STUDY.uses("backbone"),
        code=STUDY.code("backbone"),
        file=STUDY.params_file,
    shell:
        "exec genseg lease --log {log} --gpus {resources.gpu} -- genseg backbone --params {params.file}"
