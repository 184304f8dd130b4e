rule train_gs:
    input:
        f"{DATA}/manifest.json",
        f"{RESULTS}/backbone/manifest.json",
        f"{RESULTS}/latents/train.json",
    output:
        f"{RESULTS}/model/manifest.json",
    log:
        f"{WORK}/logs/train_gs.log",
    benchmark:
        f"{WORK}/benchmarks/train_gs.tsv"
    conda:
        "../envs/genseg.yaml"
    threads: STUDY.threads("train")
    resources:
        **STUDY.resources("train"),
    params:
        model="gs",
        uses=STUDY.uses("train"),
        code=STUDY.code("train"),
        file=STUDY.params_file,
    shell:
        "exec genseg lease --log {log} --gpus {resources.gpu} -- "
        "genseg train --params {params.file} --model {params.model}"


use rule train_gs as train_control with:
    output:
        f"{RESULTS}/control/manifest.json",
    log:
        f"{WORK}/logs/train_control.log",
    benchmark:
        f"{WORK}/benchmarks/train_control.tsv"
    params:
        model="discriminative",
        uses=STUDY.uses("train"),
        code=STUDY.code("train"),
        file=STUDY.params_file,


rule train:
    input:
        rules.train_gs.output,
        rules.train_control.output,
