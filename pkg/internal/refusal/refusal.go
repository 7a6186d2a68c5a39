// Package refusal makes errors that claims, pods and snapshots show.
package refusal

import "fmt"

// refusal is an error of a kind whose text is all that its reader needs.
type refusal struct{ kind, text error }

// Errorf takes a format and what goes into it, as fmt.Errorf does, and makes an error of a kind of it, of which only errors.Is tells.
func Errorf(kind error, format string, args ...any) error {
	return &refusal{kind, fmt.Errorf(format, args...)}
}

func (r *refusal) Error() string   { return r.text.Error() }
func (r *refusal) Unwrap() []error { return []error{r.kind, r.text} }
