# needs: tables and figures of every dataset.   makes: one page of them.   next: the reader


rule report:
    """Tables and figures of every dataset, on one page that opens offline."""
    input:
        [FILES[dataset].results for dataset in DATASETS],
    output:
        files.REPORT,
    log:
        "results/logs/report.log",
    conda:
        ENVIRONMENT
    params:
        folders=[each.of(files.FOLDER) for each in FILES.values()],
    shell:
        "exec python -m anisodiff report {params.folders:q} --output {output:q} >{log:q} 2>&1"
