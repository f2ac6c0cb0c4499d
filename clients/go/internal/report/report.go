// Package report tells people on stderr how it goes.
package report

import (
	"fmt"
	"os"

	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc/status"

	"github.com/hidream-grpc/hidream-grpc/clients/go/hidream"
	hidreamv1 "github.com/hidream-grpc/hidream-grpc/clients/go/hidream/v1"
)

// Event prints what happened to a job.
func Event(event *hidreamv1.JobEvent) {
	switch event := event.GetEvent().(type) {
	case *hidreamv1.JobEvent_Queued:
		fmt.Fprintf(os.Stderr, "queued, position %d\n", event.Queued.GetQueuePosition())
	case *hidreamv1.JobEvent_Started:
		fmt.Fprintf(os.Stderr, "started, seed %d\n", event.Started.GetSpec().GetSeed())
	case *hidreamv1.JobEvent_Progress:
		fmt.Fprintf(os.Stderr, "step %d of %d, %v\n", event.Progress.GetStep(),
			event.Progress.GetTotalSteps(), event.Progress.GetStepDuration().AsDuration())
	case *hidreamv1.JobEvent_Restarted:
		fmt.Fprintf(os.Stderr, "restarted: %s\n", event.Restarted.GetReason())
	case *hidreamv1.JobEvent_Succeeded:
		fmt.Fprintf(os.Stderr, "succeeded after %v\n",
			event.Succeeded.GetJob().GetTimings().GetTotal().AsDuration())
	}
}

// Reconnecting goes on when the connection is lost, and says each time that it was.
func Reconnecting() hidream.ReconnectPolicy {
	return hidream.ReconnectPolicy{OnConnectionLost: func(err error) { Error("connection lost", err) }}
}

// Error prints what went wrong in a program, and every bad field of a refused request.
func Error(program string, err error) {
	fmt.Fprintf(os.Stderr, "%s: %v\n", program, err)
	for _, detail := range status.Convert(err).Details() {
		if badRequest, isBadRequest := detail.(*errdetails.BadRequest); isBadRequest {
			for _, violation := range badRequest.GetFieldViolations() {
				fmt.Fprintf(os.Stderr, "  %s: %s\n", violation.GetField(), violation.GetDescription())
			}
		}
	}
}
