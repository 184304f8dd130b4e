rule train_gs:
    input:
        f"{DATA}/manifest.json",
        f"{RESULTS}/backbone/manifest.json",
        f"{RESULTS}/latents/train.json",
    output:
        f"{RESULTS}/model/gs/manifest.json",
    log:
        STUDY.log("train_gs"),
    benchmark:
        STUDY.benchmark("train_gs")
    conda:
        "../envs/genseg.yaml"
    threads: STUDY.threads("train")
    resources:
        **STUDY.resources("train"),
    params:
        **STUDY.params("train"),
    shell:
        STUDY.command("train --model gs")


rule train_discriminative:
    input:
        rules.train_gs.input,
    output:
        f"{RESULTS}/model/discriminative/manifest.json",
    log:
        STUDY.log("train_discriminative"),
    benchmark:
        STUDY.benchmark("train_discriminative")
    conda:
        "../envs/genseg.yaml"
    threads: STUDY.threads("train")
    resources:
        **STUDY.resources("train"),
    params:
        **STUDY.params("train"),
    shell:
        STUDY.command("train --model discriminative")


rule train:
    input:
        rules.train_gs.output,
        rules.train_discriminative.output,
