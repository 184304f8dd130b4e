# What training reads, apart: one more size to sample at must not train again.
rule latents_train:
    input:
        f"{DATA}/manifest.json",
        f"{RESULTS}/backbone/manifest.json",
    output:
        f"{RESULTS}/latents/train.json",
    log:
        f"{WORK}/logs/latents_train.log",
    benchmark:
        f"{WORK}/benchmarks/latents_train.tsv"
    conda:
        "../envs/genseg.yaml"
    threads: STUDY.threads("latents")
    resources:
        **STUDY.resources("latents"),
    params:
        uses=STUDY.uses("latents", only=["latents", "train.size"]),
        code=STUDY.code("latents"),
        file=STUDY.params_file,
    shell:
        "exec genseg lease --log {log} --gpus {resources.gpu} -- "
        "genseg latents --params {params.file} --only-training"


# Every size; what is there already is kept.
rule latents:
    input:
        f"{DATA}/manifest.json",
        f"{RESULTS}/backbone/manifest.json",
        f"{RESULTS}/latents/train.json",
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
