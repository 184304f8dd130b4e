rule latents:
    input:
        f"{DATA}/manifest.json",
        f"{RESULTS}/backbone/manifest.json",
    output:
        f"{RESULTS}/latents/manifest.json",
    log:
        f"{WORK}/logs/latents.log",
    benchmark:
        f"{WORK}/benchmarks/latents.tsv"
    conda:
        "../envs/genseg.yaml"
    threads: STUDY.threads("latents")
    resources:
        **STUDY.resources("latents"),
    params:
        uses=STUDY.uses("latents"),
        code=STUDY.code("latents"),
        file=STUDY.params_file,
    shell:
        "exec genseg lease --log {log} --gpus {resources.gpu} -- genseg latents --params {params.file}"
