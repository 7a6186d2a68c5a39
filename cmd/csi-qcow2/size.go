package main

import (
	"errors"
	"fmt"
	"math"
	"math/big"
	"strconv"
	"strings"

	"github.com/spf13/cobra"

	"github.com/csi-qcow2/csi-qcow2/pkg/human"
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

// parseSize reads a number of bytes: digits, with one of the suffixes K, M, G, T, P (powers of 1024) also with a fraction. The
// suffix may be written as in Kubernetes' quantities, Gi, and in full, GiB.
func parseSize(s string) (int64, error) {
	number, shift := strings.TrimSuffix(strings.TrimSuffix(s, "B"), "i"), 0
	if n := len(number); n > 0 {
		if i := strings.IndexByte(sizeSuffixes, number[n-1]&^0x20); i >= 0 {
			number, shift = number[:n-1], 10*(i+1)
		}
	}
	// What is left of the suffix must be one, and whole: neither 1i nor 1B, nor 1GB, which may be meant as 10^9.
	suffix := strings.TrimPrefix(s, number)
	ok := suffix == "" || shift > 0 && (len(suffix) == 1 || suffix[1:] == "i" || suffix[1:] == "iB")
	whole, fraction, fractional := strings.Cut(number, ".")
	n, err := parseNumber(whole)
	tooLarge := errors.Is(err, strconv.ErrRange) || err == nil && n > math.MaxInt64>>shift
	part := int64(0)
	if fractional {
		var decimal bool
		part, decimal = fractionOf(fraction, shift)
		ok = ok && shift > 0 && decimal && strings.Trim(whole, "0123456789") == ""
	}
	switch {
	case ok && tooLarge:
		return 0, fmt.Errorf("size %s is too large", s)
	case !ok || err != nil:
		return 0, fmt.Errorf("%q is not a size: bytes, or a number with K, M, G, T or P (powers of 1024), as in 64K, 1.5G, 10GiB", s)
	}
	return n<<shift + part, nil
}

// sizeArgument is parseSize for an argument of a command.
func sizeArgument(cmd *cobra.Command, s string) (int64, error) {
	n, err := parseSize(s)
	if err != nil {
		return 0, wrongUsage(cmd, err)
	}
	return n, nil
}

// fractionOf returns 0.DIGITS of a unit of 1<<shift bytes, rounded down.
func fractionOf(digits string, shift int) (bytes int64, ok bool) {
	if digits == "" || len(digits) > 18 || strings.Trim(digits, "0123456789") != "" {
		return 0, false
	}
	part, ok := new(big.Rat).SetString("0." + digits)
	if !ok {
		return 0, false
	}
	part.Mul(part, new(big.Rat).SetInt64(1<<shift))
	return new(big.Int).Quo(part.Num(), part.Denom()).Int64(), true
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

// ratioFlag is a flag whose value is a number above 0.
type ratioFlag float64

func (f *ratioFlag) String() string { return strconv.FormatFloat(float64(*f), 'g', -1, 64) }
func (f *ratioFlag) Type() string   { return "ratio" }

func (f *ratioFlag) Set(s string) error {
	n, err := strconv.ParseFloat(s, 64)
	if err != nil || !(n > 0) || math.IsInf(n, 0) { // nor NaN
		return fmt.Errorf("%q is not a ratio: a number above 0, as in 1.5", s)
	}
	*f = ratioFlag(n)
	return nil
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
func humanSize(n int64) string { return human.Size(n) }
