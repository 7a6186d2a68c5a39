#!/usr/bin/awk -f
# Prints what the tests that failed have said, from the output of `go test` with or without -v: at the end of a long output,
# which is what people look at first. At most 40 lines of each.
function belongs(test) { name = test; if (!seen[name]++) order[++tests] = name }

/^=== (RUN|NAME|CONT) / { belongs($3); next }
/^=== /                 { next }
/^ *--- (FAIL|PASS|SKIP): / { belongs($3); if ($2 == "FAIL:") failed[name] = $0; next }
/^(ok|FAIL|PASS|\?)/    { name = ""; next }
/^panic: /              { belongs(name == "" ? "panic" : name); failed[name] = $0 }
name != "" && ++lines[name] <= 40 { text[name] = text[name] $0 "\n" }

END {
	for (i = 1; i <= tests; i++) {
		if (order[i] in failed) printf "\n%s\n%s", failed[order[i]], text[order[i]]
	}
}
