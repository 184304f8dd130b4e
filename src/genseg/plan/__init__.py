"""What a study will take: data counts, parameters, memory, bytes, operations and hours, without a GPU, data or weights."""
