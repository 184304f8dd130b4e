"""Plan of a study: data counts, parameters, memory, disk space, operations and hours, without a GPU, data or weights."""
