"""One self-contained HTML page about one or several runs, from nothing but the files in their folders."""
