"""Speed, as ratios within one run; figures with hardware and spread go to RESULTS.md."""
