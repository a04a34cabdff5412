"""What every part of a report uses: steps, their servers, their files, sizes, texts, hashes."""
