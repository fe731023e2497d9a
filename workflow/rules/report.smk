# needs: tables and figures of every dataset.   makes: one page of them.   next: the reader


rule report:
    """Tables and figures of every dataset, on one page that opens offline."""
    input:
        [results_of(dataset) for dataset in DATASETS],
    output:
        "results/report.html",
    log:
        "results/logs/report.log",
    conda:
        ENVIRONMENT
    params:
        folders=[f"results/{dataset}" for dataset in DATASETS],
    shell:
        "exec python -m anisodiff report {params.folders:q} --output {output:q} >{log:q} 2>&1"
