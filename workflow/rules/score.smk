rule score:
    input:
        f"{DATA}/manifest.json",
        f"{RESULTS}/predictions/manifest.json",
        STUDY.refinement(),
    output:
        f"{RESULTS}/scores/manifest.json",
    log:
        f"{WORK}/logs/score.log",
    benchmark:
        f"{WORK}/benchmarks/score.tsv"
    conda:
        "../envs/genseg.yaml"
    threads: STUDY.threads("score")
    resources:
        **STUDY.resources("score"),
    params:
        uses=STUDY.uses("score"),
        code=STUDY.code("score"),
        file=STUDY.params_file,
    shell:
        "exec genseg lease --log {log} --gpus {resources.gpu} -- genseg score --params {params.file}"
