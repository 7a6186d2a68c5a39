// Package circle is two files that call each other, for the test.
package circle

// A calls B.
func A(n int) int { return B(n) }
