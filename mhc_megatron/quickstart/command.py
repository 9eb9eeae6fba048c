def add_parser(c): c.add_parser("quickstart")
def run(o): return 0
