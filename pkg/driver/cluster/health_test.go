package cluster

import (
	"context"
	"errors"
	"slices"
	"strings"
	"testing"

	core "k8s.io/api/core/v1"
	"k8s.io/client-go/tools/record"
)

// Each change for the worse, and for the better, is told once, about the volume's claim.
func TestHealth(t *testing.T) {
	ours := boundClaim("ours", "here-v")
	ours[1].(*core.PersistentVolume).Spec.ClaimRef = &core.ObjectReference{Kind: "PersistentVolumeClaim", Namespace: "ns", Name: "ours"}
	a := start(t, append(ours, boundClaim("theirs", "there-v")...)...)
	events := record.NewFakeRecorder(16)
	events.IncludeObject = true
	h := &health{Options: a.options(), events: events, before: map[string]Volume{}}
	well := Volume{Name: "volume-of-ours", Handle: "here-v", Deaths: 2}
	with := func(change func(*Volume)) Volume {
		v := well
		change(&v)
		return v
	}
	for _, c := range []struct {
		what string
		v    Volume
		want []string // types and reasons
	}{
		{"found well", well, nil},
		{"still well", well, nil},
		{"a worker has died", with(func(v *Volume) { v.Deaths = 3 }), []string{"Warning WorkerReplaced"}},
		{"another engine, which counts anew", with(func(v *Volume) { v.Deaths = 0 }), nil},
		{"failed", with(func(v *Volume) { v.Deaths = 1; v.Reason = "VolumeFailed" }), []string{"Warning VolumeFailed"}},
		{"still failed", with(func(v *Volume) { v.Deaths = 1; v.Reason = "VolumeFailed" }), nil},
		{"well again", with(func(v *Volume) { v.Deaths = 1 }), []string{"Normal VolumeRecovered"}},
		{"another volume of that name", Volume{Name: "volume-of-theirs", Handle: "here-v", Reason: "VolumeFailed"}, nil},
		{"no such volume", Volume{Name: "unknown", Handle: "here-w", Reason: "VolumeFailed"}, nil},
	} {
		h.Attached = func(context.Context) ([]Volume, error) { return []Volume{c.v}, nil }
		if err := h.look(t.Context()); err != nil {
			t.Fatal(err)
		}
		var got []string
		for len(events.Events) > 0 {
			words := strings.Fields(<-events.Events)
			got = append(got, strings.Join(words[:2], " "))
			if !strings.Contains(strings.Join(words, " "), "PersistentVolumeClaim") {
				t.Errorf("%s: about %q", c.what, words)
			}
		}
		if !slices.Equal(got, c.want) {
			t.Errorf("%s: %q, want %q", c.what, got, c.want)
		}
	}
	h.Attached = func(context.Context) ([]Volume, error) { return nil, errors.New("no engine") }
	if err := h.look(t.Context()); err == nil {
		t.Error("the engine's error is lost")
	}
}
