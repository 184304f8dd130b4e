rule baselines:
    input:
        f"{DATA}/manifest.json",
        f"{RESULTS}/backbone/manifest.json",
        STUDY.imported(),
    output:
        f"{RESULTS}/baselines/manifest.json",
    log:
        f"{WORK}/logs/baselines.log",
    benchmark:
        f"{WORK}/benchmarks/baselines.tsv"
    conda:
        "../envs/genseg.yaml"
    threads: STUDY.threads("baselines")
    resources:
        **STUDY.resources("baselines"),
    params:
        uses=STUDY.uses("baselines"),
        code=STUDY.code("baselines"),
        file=STUDY.params_file,
    shell:
        "exec genseg lease --log {log} --gpus {resources.gpu} -- genseg baseline --params {params.file}"
