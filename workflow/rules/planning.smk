# needs: CONFIG, base networks, images.   makes: speeds of this machine, and a plan.   next: the reader


rule throughput_of:
    """How fast a dataset's networks sample and train where this runs."""
    input:
        images="results/{dataset}/images",
        network=lambda wildcards: base_file(wildcards.dataset),
        features=features_file,
    output:
        "results/{dataset}/throughput.json",
    log:
        "results/{dataset}/logs/throughput.log",
    conda:
        ENVIRONMENT
    threads: cpus("throughput")
    resources:
        **asks("throughput"),
    params:
        compute=compute_json(),
        dataset=dataset_json,
        batch=lambda wildcards: DATASETS[wildcards.dataset]["sampling"]["batch"],
        runs=lambda wildcards: as_json(DATASETS[wildcards.dataset]["runs"]),
        warps=lambda wildcards: as_json(DATASETS[wildcards.dataset]["warps"]),
        kind=lambda wildcards: DATASETS[wildcards.dataset]["features"]["kind"],
    shell:
        "exec python -m anisodiff throughput --dataset {params.dataset:q} --batch {params.batch}"
        " --runs {params.runs:q} --warps {params.warps:q} --images {input.images:q} --network {input.network:q}"
        " --features {input.features:q} --features-kind {params.kind:q} --output {output:q}"
        " --compute {params.compute:q} --threads {threads} >{log:q} 2>&1"


rule plan:
    """Print jobs, evaluations, device hours and disk of the whole configuration; nothing is made."""
    log:
        "results/logs/plan.txt",
    conda:
        ENVIRONMENT
    params:
        text=lambda wildcards: planning.page(CONFIG, len(FETCHED), Path("results")),
    shell:
        "printf '%s\\n' {params.text:q} | tee {log:q}"
