"""Rows: read, recognise, render, mask, pack, collate."""

from topwork.data.collators import (
    DataCollatorForLanguageModeling,
    DataCollatorForSeq2Seq,
    DataCollatorForTokenClassification,
    DataCollatorWithPacking,
    DataCollatorWithPadding,
    default_data_collator,
)

__all__ = [
    "DataCollatorForLanguageModeling",
    "DataCollatorForSeq2Seq",
    "DataCollatorForTokenClassification",
    "DataCollatorWithPacking",
    "DataCollatorWithPadding",
    "default_data_collator",
]
