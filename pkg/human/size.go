// Package human writes figures for people.
package human

import (
	"fmt"
	"strconv"
	"strings"
)

const suffixes = "KMGTPE"

// Size writes n bytes, rounded: "1.5 GiB".
func Size(n int64) string {
	if n < 0 {
		return "-" + Size(max(-n, 0)) // of the least number there is no positive one
	}
	if n < 1024 {
		return fmt.Sprintf("%d B", n)
	}
	value, suffix := float64(n)/1024, 0
	for value >= 1024 && suffix < len(suffixes)-1 {
		value /= 1024
		suffix++
	}
	text := strconv.FormatFloat(value, 'f', 1, 64)
	return strings.TrimSuffix(text, ".0") + " " + suffixes[suffix:suffix+1] + "iB"
}

// ExactSize writes n bytes so that another n is never written the same.
func ExactSize(n int64) string {
	text := Size(n)
	if exact(n) {
		return text
	}
	return fmt.Sprintf("%s (%d bytes)", text, n)
}

// exact tells whether n is less than 1024 of a unit.
func exact(n int64) bool {
	for n >= 1024 && n%1024 == 0 {
		n /= 1024
	}
	return n < 1024
}
