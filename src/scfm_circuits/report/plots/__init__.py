"""The figures of the book, a file for each group of chapters; `style` is shared."""
