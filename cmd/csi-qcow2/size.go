package main

import (
	"errors"
	"fmt"
	"math"
	"strconv"
	"strings"
)

// sizeSuffixes are powers of 1024, in order: K is the first.
const sizeSuffixes = "KMGTP"

// parseNumber reads a number that is decimal, however many zeros it begins with, or hexadecimal, 0x…. It has no sign.
func parseNumber(s string) (int64, error) {
	base := 10
	if hex, ok := strings.CutPrefix(strings.ToLower(s), "0x"); ok {
		s, base = hex, 16
	}
	n, err := strconv.ParseUint(s, base, 63)
	return int64(n), err
}

// parseSize reads a number of bytes: digits with one of the suffixes K, M, G, T, P (powers of 1024), which
// may be followed by "i" as in Kubernetes' quantities.
func parseSize(s string) (int64, error) {
	digits, shift := strings.TrimSuffix(s, "i"), 0
	if n := len(digits); n > 0 {
		if i := strings.IndexByte(sizeSuffixes, digits[n-1]&^0x20); i >= 0 {
			digits, shift = digits[:n-1], 10*(i+1)
		}
	}
	n, err := parseNumber(digits)
	switch {
	case errors.Is(err, strconv.ErrRange):
		return 0, fmt.Errorf("size %s is too large", s)
	case err != nil, shift == 0 && digits != s:
		return 0, fmt.Errorf("%q is not a size: a number of bytes, or with K, M, G, T, P as in 64K", s)
	}
	if n > math.MaxInt64>>shift {
		return 0, fmt.Errorf("size %s is too large", s)
	}
	return n << shift, nil
}

// sizeFlag is a flag whose value is a size.
type sizeFlag int64

func (f *sizeFlag) String() string { return formatSize(int64(*f)) }
func (f *sizeFlag) Type() string   { return "size" }

func (f *sizeFlag) Set(s string) error {
	n, err := parseSize(s)
	*f = sizeFlag(n)
	return err
}

// formatSize writes n bytes as parseSize reads them, exactly.
func formatSize(n int64) string {
	suffix := -1
	for n != 0 && n%1024 == 0 && suffix < len(sizeSuffixes)-1 {
		n /= 1024
		suffix++
	}
	if suffix < 0 {
		return strconv.FormatInt(n, 10)
	}
	return strconv.FormatInt(n, 10) + sizeSuffixes[suffix:suffix+1]
}

// humanSize writes n bytes for people, rounded: "1.5 GiB".
func humanSize(n int64) string {
	if n < 1024 {
		return fmt.Sprintf("%d B", n)
	}
	value, suffix := float64(n)/1024, 0
	for value >= 1024 && suffix < len(sizeSuffixes)-1 {
		value /= 1024
		suffix++
	}
	text := strconv.FormatFloat(value, 'f', 1, 64)
	return strings.TrimSuffix(text, ".0") + " " + sizeSuffixes[suffix:suffix+1] + "iB"
}
