package main

import (
	"fmt"
	"slices"
	"strings"
	"time"
)

// row is a figure of ours beside QEMU's.
type row struct {
	Part  string  `json:"part"`
	Name  string  `json:"name"`
	Unit  string  `json:"unit"`
	Ours  float64 `json:"ours"`
	QEMU  float64 `json:"qemu"`
	Ratio float64 `json:"ratio"`           // how many times better ours is
	Bound float64 `json:"bound,omitempty"` // what the disk needs for it
}

// report is all rows of a run.
type report struct {
	Rows []row `json:"rows"`
}

// table prints the head of a table.
func table(columns ...string) {
	fmt.Printf("| %s |\n|%s\n", strings.Join(columns, " | "), strings.Repeat(" --- |", len(columns)))
}

// add prints a row and keeps it. Of what is to be large, ours is better if it is larger.
func (r *report) add(x row, large bool, more ...string) {
	if large && x.QEMU > 0 {
		x.Ratio = x.Ours / x.QEMU
	} else if !large && x.Ours > 0 {
		x.Ratio = x.QEMU / x.Ours
	}
	r.Rows = append(r.Rows, x)
	cells := append([]string{x.Name, number(x.Ours), number(x.QEMU), number(x.Ratio)}, more...)
	fmt.Printf("| %s |\n", strings.Join(cells, " | "))
}

func number(x float64) string {
	switch {
	case x >= 100:
		return fmt.Sprintf("%.0f", x)
	case x >= 10:
		return fmt.Sprintf("%.1f", x)
	}
	return fmt.Sprintf("%.2f", x)
}

func milliseconds(d time.Duration) float64 { return float64(d) / float64(time.Millisecond) }

func median(ds []time.Duration) time.Duration {
	if len(ds) == 0 {
		return 0
	}
	slices.Sort(ds)
	return ds[len(ds)/2]
}

// quantile returns the smallest duration that the share q of all does not exceed. ds is sorted.
func quantile(ds []time.Duration, q float64) time.Duration {
	if len(ds) == 0 {
		return 0
	}
	return ds[min(int(q*float64(len(ds))), len(ds)-1)]
}
