"""What fusedreg has for other frameworks: a module each, which imports its framework, and which nothing else imports.

``fusedreg.integrations.transformers`` and ``fusedreg.integrations.lightning`` have a callback that logs and one for
target sparsity; importing ``fusedreg.integrations.timm`` gives timm our optimizers. See docs/frameworks.md.
"""
