# needs: CONFIG, base networks, images.   makes: speeds of this machine, and a plan.   next: the reader


rule throughput_of:
    """How fast a dataset's networks sample and train where this runs."""
    input:
        images=files.IMAGES,
        network=base_file,
        features=features_file,
    output:
        files.THROUGHPUT,
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
        batch=setting("sampling.batch"),
        runs=entries_json("runs"),
        warps=entries_json("warps"),
        kind=setting("features.kind"),
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
        text=lambda wildcards: planning.page(CONFIG, counted(), Path(files.RESULTS)),
    shell:
        "printf '%s\\n' {params.text:q} | tee {log:q}"
