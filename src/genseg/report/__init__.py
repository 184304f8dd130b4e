"""Tables, figures and the page of a study, made from its scores and the published numbers."""
