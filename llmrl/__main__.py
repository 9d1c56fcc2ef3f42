"""`python -m llmrl` is `llmrl`."""

from llmrl.cli import main

main()
