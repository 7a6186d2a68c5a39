package main

import (
	"math"
	"testing"
)

func TestParseSize(t *testing.T) {
	for s, want := range map[string]int64{
		"0": 0, "1": 1, "512": 512, "1k": 1 << 10, "64K": 64 << 10, "64Ki": 64 << 10, "3M": 3 << 20, "10G": 10 << 30,
		"10Gi": 10 << 30, "2T": 2 << 40, "1P": 1 << 50, "0x1000": 4096, "9223372036854775807": math.MaxInt64, "8191P": 8191 << 50,
		"0100M": 100 << 20, "010": 10, "08": 8, "00": 0, "0X10K": 16 << 10,
		"10GiB": 10 << 30, "1KiB": 1 << 10, "1.5G": 3 << 29, "0.5kiB": 512, "1.3K": 1331, "8191.5P": 8191<<50 + 1<<49,
	} {
		if got, err := parseSize(s); err != nil || got != want {
			t.Errorf("%q is %d, %v; want %d", s, got, err, want)
		}
	}
	for _, s := range []string{
		"", "K", "i", "-1", "1.5", "1.G", ".5G", "1.5.5G", "1.-5G", "0x1.8K", "1i", "1iB", "1B", "1Kii", "1KB", "1KBi", "8192P", "9223372036854775808", "1 K", "0x", "ten",
		"+64M", "+1", "0b1", "0o7", "1_000", "0x_1", "0x-1", "0x+1", "0x0x1", "1e3", " 1", "٣",
	} {
		if got, err := parseSize(s); err == nil {
			t.Errorf("%q is %d", s, got)
		}
	}
}

func TestFormatSize(t *testing.T) {
	for n, want := range map[int64]string{0: "0", 1: "1", 1023: "1023", 1024: "1K", 1025: "1025", 64 << 10: "64K", 3 << 40: "3T", 1 << 60: "1024P"} {
		got := formatSize(n)
		if back, err := parseSize(got); got != want || err != nil || back != n {
			t.Errorf("%d is %q, want %q; read back: %d, %v", n, got, want, back, err)
		}
	}
}

func TestHumanSize(t *testing.T) {
	for n, want := range map[int64]string{0: "0 B", 1023: "1023 B", 1024: "1 KiB", 1536: "1.5 KiB", 10 << 30: "10 GiB", 1<<40 + 1: "1 TiB"} {
		if got := humanSize(n); got != want {
			t.Errorf("%d is %q, want %q", n, got, want)
		}
	}
}
