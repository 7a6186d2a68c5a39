package human

import "testing"

func TestSize(t *testing.T) {
	for n, want := range map[int64]string{
		0: "0 B", 1023: "1023 B", 1024: "1 KiB", 1536: "1.5 KiB", 1 << 30: "1 GiB", 1<<30 + 1: "1 GiB", 5 << 40: "5 TiB",
		1<<63 - 1: "8 EiB", -1 << 20: "-1 MiB",
	} {
		if got := Size(n); got != want {
			t.Errorf("%d is %q, want %q", n, got, want)
		}
	}
}

func TestExactSize(t *testing.T) {
	for n, want := range map[int64]string{
		7: "7 B", 1 << 30: "1 GiB", 1<<30 + 4096: "1 GiB (1073745920 bytes)", 1_000_000_000: "953.7 MiB (1000000000 bytes)",
	} {
		if got := ExactSize(n); got != want {
			t.Errorf("%d is %q, want %q", n, got, want)
		}
	}
}
