"""Stage `report`: one self-contained HTML page, figures and tables that show what a run did and whether it worked."""
