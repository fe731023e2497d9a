# needs: urls and hashes of the configuration.   makes: fetched files, reference statistics.   next: training.smk


rule fetch:
    """A published or committed file, refused if its hash differs."""
    output:
        "results/{dataset}/fetched/{file}",
    log:
        "results/{dataset}/logs/fetch/{file}.log",
    conda:
        ENVIRONMENT
    params:
        known=known_file,
    shell:
        "exec python -m anisodiff fetch --url {params.known[url]:q} --sha256 {params.known[sha256]} --output {output:q}"
        " >{log} 2>&1"


rule reference:
    """Feature statistics of the data."""
    input:
        features=lambda wildcards: fetched(wildcards.dataset, "features"),
    output:
        "results/{dataset}/reference.safetensors",
    log:
        "results/{dataset}/logs/reference.log",
    conda:
        ENVIRONMENT
    threads: CONFIG["threads"]
    params:
        device=CONFIG["device"],
        dataset=dataset_json,
        kind=lambda wildcards: DATASETS[wildcards.dataset]["features"]["kind"],
    shell:
        "exec python -m anisodiff reference --dataset {params.dataset:q} --features {input.features:q}"
        " --features-kind {params.kind} --output {output:q} --device {params.device} --threads {threads} >{log} 2>&1"
