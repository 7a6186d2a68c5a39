package main

import (
	"regexp"
	"strings"
)

// rules name what order and durability depend on.
type rules struct {
	// syncs are calls whose return promises something, or refuses something. Without one, its error is nil.
	syncs *regexp.Regexp
	// notes are calls without a result that tell somebody what order depends on. They are left out.
	notes *regexp.Regexp
	// marks are fields that say what is still due, or whose turn it is. Setting one is left out.
	marks *regexp.Regexp
	// guards are in conditions under which something is left alone. Such a condition is false.
	guards *regexp.Regexp
	// ordered are calls of which neighbours must not change places.
	ordered *regexp.Regexp
}

func newRules() rules {
	return rules{
		syncs: names(`sync fsync fdatasync syncDir syncFS syncParent fsyncDir settle endCommit fixMapping commitBeforehand flush commit commitMapping writeBack
			completeRefcounts completeL1 endReservation giveBack mirror refuse punchHole abort`),
		notes: names(`freeze preserve touch forget note mapped unmake remove reuse setReleasing wait cancel undo delete store noteWrite`),
		marks: names(`barrier sharesAll preserved freed dirty disturbed settled fixed unsafe unsafeEnd build deferred late l1Dirty growth failed broken
			closed closing leaving pending owner served journal`),
		guards: regexp.MustCompile(`(?i)unsafe|busy|\.free\(|frozen|sharesAll|preserved|owns?\(|copied|settled|n\.fixed|\.build\b|viewed|holds|barrier|disturbed|` +
			`failed\(|closing|closed|dirty|pending|writing|lease|locked|guard|stale|marked|l1\[`),
		ordered: names(`sync fsync fdatasync syncDir syncFS syncParent rename renameAt renameAt2 renameNoReplace exchange link unlink remove removeAll
			writeAt writeAll writeBlocks truncate punchHole switchHeader publish hide mark unmark replaceFile overwrite writeBack prepare
			reach commit commitMapping retire release flush close abort store noteWrite`),
	}
}

// names matches words as a whole, whatever the case of their letters.
func names(words string) *regexp.Regexp {
	return regexp.MustCompile("(?i)^(" + strings.Join(strings.Fields(words), "|") + ")$")
}
