rule tables:
    input:
        STUDY.published(),
        f"{DATA}/manifest.json",
        f"{RESULTS}/model/manifest.json",
        f"{RESULTS}/predictions/manifest.json",
        f"{RESULTS}/refined/manifest.json",
        f"{RESULTS}/scores/manifest.json",
    output:
        f"{RESULTS}/tables/manifest.json",
        report(f"{RESULTS}/tables/index.html", caption="../report/tables.rst", category="Tables"),
        report(f"{RESULTS}/tables/table2.csv", caption="../report/table2.rst", category="Tables"),
        report(f"{RESULTS}/figures/examples.png", caption="../report/examples.rst", category="Figures"),
        report(f"{RESULTS}/figures/evolution.png", caption="../report/evolution.rst", category="Figures"),
    log:
        f"{WORK}/logs/tables.log",
    benchmark:
        f"{WORK}/benchmarks/tables.tsv"
    conda:
        "../envs/genseg.yaml"
    threads: STUDY.threads("tables")
    resources:
        **STUDY.resources("tables"),
    params:
        uses=STUDY.uses("tables"),
        code=STUDY.code("tables"),
        file=STUDY.params_file,
    shell:
        "exec genseg lease --log {log} --gpus {resources.gpu} -- genseg tables --params {params.file}"
