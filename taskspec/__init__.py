"""taskspec: one dense retriever for many retrieval tasks, trained so that each parameter specializes."""

__version__ = "0.1.0"
