"""How it is shown: notebooks through papermill, the book, chapters, figures."""
