# needs: urls and hashes of the configuration.   makes: fetched files, reference statistics.   next: training.smk


rule fetch:
    """A published or committed file, refused if its hash differs."""
    output:
        RESULTS + "/fetched/{file}",
    log:
        RESULTS + "/logs/fetch/{file}.log",
    params:
        known=lambda wildcards: next(
            DATASETS[wildcards.dataset][kind]
            for kind in ("base", "features")
            if fetched(wildcards.dataset, kind).endswith("/" + wildcards.file)
        ),
    conda:
        ENVIRONMENT
    shell:
        "exec python -m anisodiff fetch --url {params.known[url]:q} --sha256 {params.known[sha256]} --output {output:q}"
        " >{log} 2>&1"


rule reference:
    """Feature statistics of the data."""
    input:
        features=lambda wildcards: fetched(wildcards.dataset, "features"),
    output:
        RESULTS + "/reference.safetensors",
    log:
        RESULTS + "/logs/reference.log",
    params:
        dataset=dataset_json,
        kind=lambda wildcards: DATASETS[wildcards.dataset]["features"]["kind"],
    threads: CONFIG["threads"]
    conda:
        ENVIRONMENT
    shell:
        "exec python -m anisodiff reference --dataset {params.dataset:q} --features {input.features:q}"
        " --features-kind {params.kind} --output {output:q} --device {DEVICE} --threads {threads} >{log} 2>&1"
